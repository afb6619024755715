-- Takes jobs whose lease has expired from their workers. They may have killed them, so they are
-- tried again alone, or, once they have been tried often enough, given up on. Then lets delayed jobs
-- whose time has come have their turn, and jobs that workers of another version set aside, if they
-- are read here.
--   ARGV: how many jobs of each kind to look at, '1' to spare expired leases, whose workers may not
--         have been able to renew them
--   Returns {number of expired leases whose jobs are tried again, number given up, number spared}.
-- Safe to repeat.
local limit, spares_leases = ARGV[1], ARGV[2] == '1'
local now = text(now_ms())
local again, given_up = 0, 0

local function end_lost_attempt(id)
  local message = 'its worker ended or stalled before the result was recorded'
  if end_attempt(id, 'lease_expired', message, true, 0) then
    again = again + 1
  else
    given_up = given_up + 1
  end
end

local function take_expired()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)) do
    local state, version = state_and_version(id)
    if state and not reads_version(version) then
      set_aside(id, version)
    elseif state == 'running' then
      end_lost_attempt(id)
    else
      redis.call('ZREM', LEASES, id)
    end
  end
end

-- A job that stood apart has its turn, unless it has ended or changed meanwhile.
local function let_go_on(id)
  local state, version = state_and_version(id)
  if state and not reads_version(version) then
    set_aside(id, version)
  elseif state == 'running' then
    end_lost_attempt(id)
  elseif state == 'waiting' then
    wait_for_turn(id)
  end
end

local function let_due_ones_wait()
  local due = redis.call('ZRANGEBYSCORE', DELAYED, '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    redis.call('ZREM', DELAYED, id)
    let_go_on(id)
  end
  return #due
end

local function take_up_what_was_set_aside()
  local num_taken_up = 0
  for version = WIRE_VERSION - 1, WIRE_VERSION do
    local found = redis.call('ZRANGEBYSCORE', SET_ASIDE, version, version, 'LIMIT', 0, limit)
    for _, id in ipairs(found) do
      redis.call('ZREM', SET_ASIDE, id)
      let_go_on(id)
    end
    num_taken_up = num_taken_up + #found
  end
  return num_taken_up
end

local num_spared = 0
if spares_leases then
  num_spared = redis.call('ZCOUNT', LEASES, '-inf', now)
else
  take_expired()
end
local num_waiting = again + let_due_ones_wait() + take_up_what_was_set_aside()
if num_waiting > 0 then redis.call('PUBLISH', WAKE, 'sweep') end
return { again, given_up, num_spared }
