-- Shared by every script of this folder; the key names (JOB, STREAM, ...), GROUP and PRIORITIES are
-- defined above it from schemas/.

-- READY and LANES are scored in microseconds, so that those served within one millisecond keep their
-- turn.
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

-- Counts jobs that came to be in a state, or left it (a negative number), and the bytes of their
-- records if that is `waiting`. What came down to nothing is deleted.
local function count(state, adapter, number, bytes)
  local by_adapter = ({ waiting = WAITING, running = RUNNING })[state]
  if not by_adapter then return end
  if redis.call('HINCRBY', by_adapter, adapter, number) <= 0 then
    redis.call('HDEL', by_adapter, adapter)
  end
  if state ~= 'waiting' then return end
  redis.call('HINCRBY', BACKLOG, 'bytes', number < 0 and -bytes or bytes)
  if redis.call('HINCRBY', BACKLOG, 'jobs', number) <= 0 then redis.call('DEL', BACKLOG) end
end

-- Lets a submission expire once all jobs that it holds have ended, and its time to live is over.
local function set_expiry(submission)
  local key, num_ended = SUBMISSION .. submission, 0
  local ttl, done, failed, dead, cancelled, expired = unpack(redis.call('HMGET', key,
    'result_ttl', 'done', 'failed', 'dead', 'cancelled', 'expired'))
  for _, number in ipairs({ done or 0, failed or 0, dead or 0, cancelled or 0, expired or 0 }) do
    num_ended = num_ended + number
  end
  if ttl and num_ended >= redis.call('LLEN', key .. ':jobs') then
    redis.call('ZADD', EXPIRY, text(now_ms() + ttl), submission)
  else
    redis.call('ZREM', EXPIRY, submission)
  end
end

-- Counts the change of a job's state in every submission it belongs to. One that sent the job twice
-- is named twice, so its counts always add up to its number of lines.
local function tell_submissions(id, submissions, from, to)
  for submission in string.gmatch(submissions, '%S+') do
    local num_left = redis.call('HINCRBY', SUBMISSION .. submission, from, -1)
    redis.call('HINCRBY', SUBMISSION .. submission, to, 1)
    if TERMINAL[to] then
      redis.call('XADD', SUBMISSION .. submission .. ':finished', '*', 'id', id)
    end
    -- While others are in the state that this one left, it is not the last one to end.
    if TERMINAL[from] or TERMINAL[to] and num_left <= 0 then set_expiry(submission) end
  end
end

-- Changes a job's state, the counts of every submission it belongs to and those of its adapter.
local function set_state(id, to)
  local from, submissions, adapter =
    unpack(redis.call('HMGET', JOB .. id, 'state', 'submissions', 'adapter'))
  local bytes = (from == 'waiting' or to == 'waiting') and redis.call('HSTRLEN', JOB .. id, 'job')
  redis.call('HSET', JOB .. id, 'state', to)
  count(from, adapter, -1, bytes)
  count(to, adapter, 1, bytes)
  tell_submissions(id, submissions, from, to)
end

-- The lane that a job waits or runs in. Of several submissions that sent it the first one counts.
local function lane_in(adapter, priority, submission)
  local band = adapter .. ':' .. priority
  return {
    adapter = adapter, priority = priority, submission = submission, band = band,
    stream = STREAM .. band .. ':' .. submission,
  }
end

local function lane_of(id)
  local adapter, priority, submissions =
    unpack(redis.call('HMGET', JOB .. id, 'adapter', 'priority', 'submissions'))
  return lane_in(adapter, priority, string.match(submissions, '%S+'))
end

-- A lane has waiting jobs: it takes its turn in its band, and its adapter among the others unless
-- it is paused.
local function open_lane(lane)
  local now = text(now_us())
  redis.call('ZADD', LANES .. lane.band, 'NX', now, lane.submission)
  if redis.call('HEXISTS', PAUSED, lane.adapter) == 0 then
    redis.call('ZADD', READY .. lane.priority, 'NX', now, lane.adapter)
  end
end

local function close_lane(lane)
  local was_open = redis.call('ZREM', LANES .. lane.band, lane.submission) == 1
  if was_open and redis.call('EXISTS', LANES .. lane.band) == 0 then
    redis.call('ZREM', READY .. lane.priority, lane.adapter)
  end
end

-- A lease is held by (worker, entry): every delivery of a job has a stream entry of its own, so a
-- worker that lost the job and got it again does not pass for its former self.
local function holds_lease(worker, id, entry)
  local state, holder, current = unpack(redis.call('HMGET', JOB .. id, 'state', 'worker', 'entry'))
  return state == 'running' and holder == worker and current == entry
end

-- Takes an entry out of its lane: deleted when it is acknowledged, so XLEN is waiting + in flight.
local function drop_entry(lane, entry)
  redis.call('XACK', lane.stream, GROUP, entry)
  redis.call('XDEL', lane.stream, entry)
  if redis.call('XLEN', lane.stream) == 0 then
    redis.call('DEL', lane.stream)
    close_lane(lane)
  end
end

-- The first entries of a lane that nobody has been given, up to `count`; they are given to `worker`
-- now. The group is made on first use, and again after a FLUSHALL.
local function read_entries(lane, worker, count)
  local function group_read()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count,
      'STREAMS', lane.stream, '>')
  end
  local found = group_read()
  if type(found) == 'table' and found.err then
    if not string.find(found.err, 'NOGROUP', 1, true) then error(found) end
    if redis.pcall('XGROUP', 'CREATE', lane.stream, GROUP, '0').err then return {} end -- No stream.
    found = group_read()
  end
  return found and found[1] and found[1][2] or {}
end

-- Puts a job at the end of its lane.
local function enqueue(id)
  local lane, deadline = lane_of(id), redis.call('HGET', JOB .. id, 'deadline')
  if deadline then redis.call('ZADD', DEADLINES, deadline, id) end
  redis.call('HSET', JOB .. id, 'entry', redis.call('XADD', lane.stream, '*', 'id', id))
  open_lane(lane)
end

-- Takes a job away from its worker and lets another one have it.
local function requeue(id)
  local entry = redis.call('HGET', JOB .. id, 'entry')
  enqueue(id) -- Before the old entry goes, so that the new one differs from it.
  drop_entry(lane_of(id), entry)
  redis.call('ZREM', LEASES, id)
  redis.call('HDEL', JOB .. id, 'worker', 'claimed')
  set_state(id, 'waiting')
end

-- Ends a job that waits or runs without a result of a worker's.
local function end_job(id, state, code, message)
  local entry = redis.call('HGET', JOB .. id, 'entry')
  redis.call('HSET', JOB .. id, 'error_code', code, 'error_message', message,
    'finished', text(now_ms()))
  redis.call('HDEL', JOB .. id, 'entry')
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', DEADLINES, id)
  set_state(id, state)
  if entry then drop_entry(lane_of(id), entry) end
end

-- Ends a waiting job whose deadline has come.
local function expire(id)
  local queued, deadline = unpack(redis.call('HMGET', JOB .. id, 'queued', 'deadline'))
  local seconds = (deadline - queued) / 1000
  local when = seconds < 0 and ' s before it was sent' or ' s after it was sent, came while it waited'
  end_job(id, 'expired', 'expired',
    string.format('not run: its deadline, %.1f', math.abs(seconds)) .. when)
end

-- Ends a job that has been tried often enough.
local function give_up(id)
  local entry, attempts = unpack(redis.call('HMGET', JOB .. id, 'entry', 'attempts'))
  local message = 'given up after ' .. attempts ..
    ' attempts: each time its worker ended or stalled before the result was recorded'
  redis.call('HSET', JOB .. id, 'error_code', 'attempts_exhausted', 'error_message', message,
    'finished', text(now_ms()))
  set_state(id, 'dead')
  redis.call('ZREM', LEASES, id)
  drop_entry(lane_of(id), entry)
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
