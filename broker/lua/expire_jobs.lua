-- Ends waiting jobs whose deadline has come. One that runs by then goes on to its end.
--   ARGV: how many jobs to look at
--   Returns how many have expired.
-- Safe to repeat.
local num_expired = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', text(now_ms()),
    'LIMIT', 0, ARGV[1])) do
  local state, version = state_and_version(id)
  if state == 'waiting' and reads_version(version) then
    expire(id)
    num_expired = num_expired + 1
  else
    redis.call('ZREM', DEADLINES, id)
  end
end
return num_expired
