-- Takes jobs whose lease has expired from their workers. They wait again, or, once they have been
-- tried often enough, are given up on.
--   ARGV: attempts allowed, how many jobs to look at
--   Returns {number made to wait again, number given up}.
local max_attempts, limit = tonumber(ARGV[1]), ARGV[2]
local now, again, given_up = now_ms(), 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now), 'LIMIT', 0, limit)) do
  local state, adapter, entry, attempts =
    unpack(redis.call('HMGET', JOB .. id, 'state', 'adapter', 'entry', 'attempts'))
  if state ~= 'running' then
    redis.call('ZREM', LEASES, id)
  elseif tonumber(attempts) < max_attempts then
    requeue(id)
    again = again + 1
  else
    local message = 'given up after ' .. attempts ..
      ' attempts: each time its worker ended or stalled before the result was recorded'
    redis.call('HSET', JOB .. id, 'error_code', 'attempts_exhausted', 'error_message', message,
      'finished', text(now))
    set_state(id, 'dead')
    redis.call('ZREM', LEASES, id)
    drop_entry(adapter, entry)
    redis.call('XADD', DEAD, '*', 'id', id, 'reason', message, 'attempts', attempts)
    given_up = given_up + 1
  end
end
if again > 0 then redis.call('PUBLISH', WAKE, 'sweep') end
return { again, given_up }
