-- Lets workers claim from the queue, or an adapter, that was paused.
--   ARGV: adapter, or '*' for the queue
--   Returns 1, or 0 if that was not paused.
-- Safe to repeat.
local name = ARGV[1]
if redis.call('HDEL', PAUSED, name) == 0 then return 0 end
for _, priority in ipairs(PRIORITIES) do
  if redis.call('EXISTS', LANES .. name .. ':' .. priority) == 1 then
    redis.call('ZADD', READY .. priority, 'NX', text(now_us()), name)
  end
end
redis.call('PUBLISH', WAKE, name)
return 1
