-- Adds adapters to the desired state; its version rises if anything changed, or if it is the first.
--   ARGV: (name, record) an adapter
--   Returns the version.
local changed = redis.call('EXISTS', ADAPTERS_VERSION) == 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', ADAPTERS, ARGV[i]) ~= ARGV[i + 1] then
    redis.call('HSET', ADAPTERS, ARGV[i], ARGV[i + 1])
    changed = true
  end
end
if changed then return redis.call('INCR', ADAPTERS_VERSION) end
return tonumber(redis.call('GET', ADAPTERS_VERSION))
