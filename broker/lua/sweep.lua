-- Takes jobs whose lease has expired from their workers. They wait again, or, once they have been
-- tried often enough, are given up on.
--   ARGV: attempts allowed, how many jobs to look at
--   Returns {number made to wait again, number given up}.
local max_attempts, limit = tonumber(ARGV[1]), ARGV[2]
local now, again, given_up = text(now_ms()), 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)) do
  if redis.call('HGET', JOB .. id, 'state') ~= 'running' then
    redis.call('ZREM', LEASES, id)
  elseif try_again(id, max_attempts) then
    again = again + 1
  else
    given_up = given_up + 1
  end
end
if again > 0 then redis.call('PUBLISH', WAKE, 'sweep') end
return { again, given_up }
