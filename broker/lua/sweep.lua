-- Takes jobs whose lease has expired from their workers. They may have killed them, so they are tried
-- again alone, or, once they have been tried often enough, given up on. Then lets delayed jobs whose
-- time has come have their turn.
--   ARGV: how many jobs of each kind to look at
--   Returns {number of expired leases whose jobs are tried again, number given up}.
-- Safe to repeat.
local limit = ARGV[1]
local now = text(now_ms())
local again, given_up = 0, 0

local function take_expired()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)) do
    if redis.call('HGET', JOB .. id, 'state') ~= 'running' then
      redis.call('ZREM', LEASES, id)
    elseif end_attempt(id, 'lease_expired',
      'its worker ended or stalled before the result was recorded', true, 0) then
      again = again + 1
    else
      given_up = given_up + 1
    end
  end
end

local function let_due_ones_wait()
  local due = redis.call('ZRANGEBYSCORE', DELAYED, '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    redis.call('ZREM', DELAYED, id)
    local state, adapter, entry =
      unpack(redis.call('HMGET', JOB .. id, 'state', 'adapter', 'entry'))
    if state == 'waiting' then wait_for_turn(id) else drop_entry(adapter, entry) end
  end
  return #due
end

take_expired()
if let_due_ones_wait() + again > 0 then redis.call('PUBLISH', WAKE, 'sweep') end
return { again, given_up }
