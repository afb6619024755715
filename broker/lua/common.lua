-- Shared by every script of this folder; the key names (JOB, STREAM, ...) and GROUP are defined
-- above it from schemas/keys.py.

-- READY is scored in microseconds, so that adapters served within one millisecond keep their turn.
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function now_ms()
  return math.floor(now_us() / 1000)
end

-- Integers as decimal text: Lua would write 1.7e+12 for a moment in milliseconds.
local function text(number)
  return string.format('%.0f', number)
end

local TERMINAL = { done = true, failed = true, dead = true, cancelled = true, expired = true }

-- Changes a job's state and the counts of every submission it belongs to. A submission that sent
-- the job twice is named twice, so its counts always add up to its number of lines.
local function set_state(id, to)
  local from, submissions = unpack(redis.call('HMGET', JOB .. id, 'state', 'submissions'))
  redis.call('HSET', JOB .. id, 'state', to)
  for submission in string.gmatch(submissions, '%S+') do
    redis.call('HINCRBY', SUBMISSION .. submission, from, -1)
    redis.call('HINCRBY', SUBMISSION .. submission, to, 1)
    if TERMINAL[to] then
      redis.call('XADD', SUBMISSION .. submission .. ':finished', '*', 'id', id)
    end
  end
end

-- A lease is held by (worker, entry): every delivery of a job has a stream entry of its own, so a
-- worker that lost the job and got it again does not pass for its former self.
local function holds_lease(worker, id, entry)
  local state, holder, current = unpack(redis.call('HMGET', JOB .. id, 'state', 'worker', 'entry'))
  return state == 'running' and holder == worker and current == entry
end

-- Ends a delivery: the entry is deleted when it is acknowledged, so XLEN is waiting + in flight.
local function drop_entry(adapter, entry)
  local stream = STREAM .. adapter
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
  if redis.call('XLEN', stream) == 0 then
    redis.call('DEL', stream)
  end
end

-- The first entries of an adapter's stream that nobody has been given, up to `count`; they are
-- given to `worker` now. The group is made on first use, and again after a FLUSHALL.
local function read_entries(adapter, worker, count)
  local stream = STREAM .. adapter
  local function group_read()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count, 'STREAMS', stream, '>')
  end
  local found = group_read()
  if type(found) == 'table' and found.err then
    if not string.find(found.err, 'NOGROUP', 1, true) then error(found) end
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    found = group_read()
  end
  return found and found[1] and found[1][2] or {}
end

-- Puts a job at the end of its adapter's stream and makes the adapter ready.
local function enqueue(id, adapter)
  redis.call('XADD', STREAM .. adapter, '*', 'id', id)
  redis.call('ZADD', READY, 'NX', text(now_us()), adapter)
end

-- Takes a job away from its worker and lets another one have it.
local function requeue(id)
  local adapter, entry = unpack(redis.call('HMGET', JOB .. id, 'adapter', 'entry'))
  enqueue(id, adapter) -- Before the old entry goes, so that the new one differs from it.
  drop_entry(adapter, entry)
  redis.call('ZREM', LEASES, id)
  redis.call('HDEL', JOB .. id, 'worker', 'entry', 'claimed')
  set_state(id, 'waiting')
end

-- Ends a job that has been tried often enough.
local function give_up(id)
  local adapter, entry, attempts =
    unpack(redis.call('HMGET', JOB .. id, 'adapter', 'entry', 'attempts'))
  local message = 'given up after ' .. attempts ..
    ' attempts: each time its worker ended or stalled before the result was recorded'
  redis.call('HSET', JOB .. id, 'error_code', 'attempts_exhausted', 'error_message', message,
    'finished', text(now_ms()))
  set_state(id, 'dead')
  redis.call('ZREM', LEASES, id)
  drop_entry(adapter, entry)
  redis.call('XADD', DEAD, '*', 'id', id, 'reason', message, 'attempts', attempts)
end

-- Takes a running job away from its worker. Returns true if it waits again, false if that was the
-- last of its attempts.
local function try_again(id, max_attempts)
  if tonumber(redis.call('HGET', JOB .. id, 'attempts')) >= max_attempts then
    give_up(id)
    return false
  end
  requeue(id)
  return true
end

-- An adapter's record in the desired state, nil if there is none. A null in it is cjson.null.
local function read_record(name)
  local record = redis.call('HGET', ADAPTERS, name)
  return record and cjson.decode(record) or nil
end

local function write_record(name, record)
  redis.call('HSET', ADAPTERS, name, cjson.encode(record))
end

-- Raises the version of the desired state and tells the workers; returns the new version.
local function desired_state_changed()
  local version = redis.call('INCR', ADAPTERS_VERSION)
  redis.call('PUBLISH', CONTROL, version)
  return version
end

-- What a load under a name replaces: what a worker has read last.
local function what_is_replaced(name)
  local record = read_record(name)
  if not record then return cjson.null end
  if type(record.previous) == 'table' then return record.previous end
  if type(record.revision) ~= 'string' then return cjson.null end
  return { source = record.source, revision = record.revision }
end

-- Lets every worker read an adapter from a source, in place of one of that name; returns the version
-- of the desired state. `revision` is cjson.null where the first worker that reads it shall say.
local function load_adapter(name, source, revision, pinned)
  local version = desired_state_changed()
  write_record(name, {
    source = source, revision = revision, pinned = pinned, unloading = cjson.null,
    version = version, previous = what_is_replaced(name),
  })
  return version
end

-- The newest request to fetch an adapter of that name, if it is the one of this id, or of any id.
local function read_fetch(name, id)
  local fetch = redis.call('HGET', FETCHES, name)
  fetch = fetch and cjson.decode(fetch)
  return fetch and (not id or fetch.id == id) and fetch or nil
end

local function write_fetch(name, fetch)
  redis.call('HSET', FETCHES, name, cjson.encode(fetch))
end

local function is_over(fetch)
  return type(fetch.error) == 'string' or type(fetch.version) == 'number'
end
