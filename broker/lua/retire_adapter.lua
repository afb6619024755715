-- Takes an adapter that is unloading off the desired state, once no job of it is left. By force,
-- its waiting jobs fail first; one that runs may still end.
--   ARGV: name, how many jobs to fail at most
--   Returns 1 if the adapter was taken off, 0 if it is not unloading or some of its jobs are left.
-- Safe to repeat.
local name, limit = ARGV[1], ARGV[2]
local record = read_record(name)
if not record or type(record.unloading) ~= 'string' then return 0 end

local function fail(entry, id)
  local state, v = unpack(redis.call('HMGET', JOB .. id, 'state', 'v'))
  if state and not reads_version(v) then
    redis.call('HSET', JOB .. id, 'entry', entry)
    return set_aside(id, v)
  end
  if state == 'waiting' then
    redis.call('HSET', JOB .. id, 'error_code', 'adapter_unloaded',
      'error_message', 'adapter ' .. name .. ' was unloaded by force while the job waited',
      'finished', text(now_ms()))
    set_state(id, 'failed')
  end
  drop_entry(name, entry)
end

-- Suspects and delayed jobs have entries that were read before.
local function fail_those_in(set)
  for _, id in ipairs(redis.call('ZRANGE', set, 0, -1)) do
    local adapter, entry = unpack(redis.call('HMGET', JOB .. id, 'adapter', 'entry'))
    if adapter == name then
      redis.call('ZREM', set, id)
      fail(entry, id)
    end
  end
end

if record.unloading == 'force' then
  fail_those_in(SUSPECTS)
  fail_those_in(DELAYED)
  for _, entry in ipairs(read_entries(name, limit)) do fail(entry[1], entry[2][2]) end
end
if redis.call('XLEN', STREAM .. name) > 0 then return 0 end
redis.call('DEL', STREAM .. name)
redis.call('ZREM', READY, name)
redis.call('HDEL', ADAPTERS, name)
desired_state_changed()
return 1
