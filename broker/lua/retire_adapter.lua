-- Takes an adapter that is unloading off the desired state, once no job of it is left. By force,
-- its waiting jobs fail first; one that runs may still end.
--   ARGV: name, how many jobs to fail at most
--   Returns 1 if the adapter was taken off, 0 if it is not unloading or some of its jobs are left.
-- Safe to repeat.
local name, limit = ARGV[1], tonumber(ARGV[2])
local record = read_record(name)
if not record or type(record.unloading) ~= 'string' then return 0 end

local MESSAGE = 'adapter ' .. name .. ' was unloaded by force while the job waited'

-- Lets up to `count` waiting jobs of a lane fail; returns how many entries it found.
local function fail_lane(lane, count)
  local entries = read_entries(lane, 'unload', count)
  for _, entry in ipairs(entries) do
    local id = entry[2][2]
    if redis.call('HGET', JOB .. id, 'state') == 'waiting' then
      end_job(id, 'failed', 'adapter_unloaded', MESSAGE)
    else
      drop_entry(lane, entry[1])
    end
  end
  if #entries < count then close_lane(lane) end
  return #entries
end

if record.unloading == 'force' then
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
