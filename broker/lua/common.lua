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

-- A lease is held by (worker, number of its claim): no two deliveries of a job share it, so a worker
-- that lost the job and got it again does not pass for its former self.
local function holds_lease(worker, id, claim)
  local state, holder, current = unpack(redis.call('HMGET', JOB .. id, 'state', 'worker', 'claim'))
  return state == 'running' and holder == worker and current == claim
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

-- The first entries of an adapter's stream that nobody has been given, up to `count`; they count as
-- given now. The group is made on first use, and again after a FLUSHALL.
local function read_entries(adapter, count)
  local stream = STREAM .. adapter
  local function group_read()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, GROUP, 'COUNT', count, 'STREAMS', stream, '>')
  end
  local found = group_read()
  if type(found) == 'table' and found.err then
    if not string.find(found.err, 'NOGROUP', 1, true) then error(found) end
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    found = group_read()
  end
  return found and found[1] and found[1][2] or {}
end

-- Lends a waiting job to a worker, until a moment in ms.
local function lend(id, worker, claim, until_ms)
  redis.call('HINCRBY', JOB .. id, 'attempts', 1)
  redis.call('HSET', JOB .. id, 'worker', worker, 'claim', claim, 'claimed', text(now_ms()))
  redis.call('ZADD', LEASES, text(until_ms), id)
  set_state(id, 'running')
end

-- What the worker that has it is told of a job:
-- {id, adapter, payload, attempts, queued, submission}.
local function lent_job(id)
  local adapter, payload, attempts, queued, submissions =
    unpack(redis.call('HMGET', JOB .. id, 'adapter', 'job', 'attempts', 'queued', 'submissions'))
  return { id, adapter, payload, attempts, queued, string.match(submissions, '%S+') }
end

-- Claims are numbered, so that one whose reply was lost may be repeated: it finds the jobs that it
-- brought, with leases of full length. A command that comes late finds none: its reply is not
-- awaited any more. Returns nil for a claim of a new number.
local function repeated_claim(worker, claim, lease)
  local last = redis.call('GET', CLAIM .. worker)
  local number, ids = string.match(last or '', '^(%d+)(.*)$')
  if not number or tonumber(claim) > tonumber(number) then return nil end
  local found = {}
  if claim ~= number then return found end
  for id in string.gmatch(ids, '%S+') do
    if holds_lease(worker, id, claim) then
      redis.call('ZADD', LEASES, 'XX', text(now_ms() + lease), id)
      table.insert(found, lent_job(id))
    end
  end
  return found
end

-- Notes what a claim has brought, for as long as that is lent.
local function note_claim(worker, claim, lease, jobs)
  local words = { claim }
  for _, job in ipairs(jobs) do table.insert(words, job[1]) end
  redis.call('SET', CLAIM .. worker, table.concat(words, ' '), 'PX', lease)
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
  redis.call('HDEL', JOB .. id, 'worker', 'claim', 'entry', 'claimed')
  set_state(id, 'waiting')
end

-- Takes a job away from its worker that has not begun it: the attempt does not count.
local function hand_back(id)
  redis.call('HINCRBY', JOB .. id, 'attempts', -1)
  requeue(id)
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
