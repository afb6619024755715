-- Takes an adapter that is unloading off the desired state, once no job of it is left. By force,
-- its waiting jobs fail first; one that runs may still end.
--   ARGV: name, how many jobs to fail at most
--   Returns 1 if the adapter was taken off, 0 if it is not unloading or some of its jobs are left.
-- Safe to repeat.
local name, limit = ARGV[1], tonumber(ARGV[2])
local record = read_record(name)
if not record or type(record.unloading) ~= 'string' then return 0 end

local MESSAGE = 'adapter ' .. name .. ' was unloaded by force while the job waited'

-- Ends a job that waits, unless its record is of a version that is not read here. Returns whether
-- there is such a job.
local function fail(id)
  local state, version = state_and_version(id)
  if state and not reads_version(version) then
    set_aside(id, version)
  elseif state == 'waiting' then
    end_job(id, 'failed', 'adapter_unloaded', MESSAGE)
  end
  return state ~= nil
end

-- Lets up to `most` waiting jobs of a lane fail; returns how many entries it found.
local function fail_lane(lane, most)
  local entries = read_entries(lane, most)
  for _, entry in ipairs(entries) do
    if not fail(entry[2][2]) then
      count('waiting', name, -1, 0) -- Its record was deleted.
      drop_entry(lane, entry[1])
    end
  end
  if #entries < most then close_lane(lane) end
  return #entries
end

-- Suspects and delayed jobs have entries that were read before.
local function fail_those_in(set)
  for _, id in ipairs(redis.call('ZRANGE', set, 0, -1)) do
    local found = job_fields(id, 'adapter')
    if found and found[1] == name then fail(id) end
  end
end

if record.unloading == 'force' then
  fail_those_in(SUSPECTS)
  fail_those_in(DELAYED)
  for _, priority in ipairs(PRIORITIES) do
    local lanes = redis.call('ZRANGE', LANES .. name .. ':' .. priority, 0, limit - 1)
    for _, submission in ipairs(lanes) do
      if limit > 0 then limit = limit - fail_lane(lane_in(name, priority, submission), limit) end
    end
  end
end
if redis.call('HEXISTS', WAITING, name) == 1 or redis.call('HEXISTS', RUNNING, name) == 1 then
  return 0
end
redis.call('HDEL', ADAPTERS, name)
redis.call('HDEL', PAUSED, name)
desired_state_changed()
return 1
