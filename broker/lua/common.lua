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

-- Calls `write` with many arguments, in pieces that find room on Lua's stack (8,000). One command for
-- all jobs of a script beats one a job: a call costs 1.3 us, whatever it does.
local function in_pieces(arguments, write)
  for first = 1, #arguments, 1000 do
    write(unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end

local TERMINAL = { done = true, failed = true, dead = true, cancelled = true, expired = true }

-- How a command says that a record is not of the kind that it needs.
local DAMAGES = { 'WRONGTYPE', 'hash value is not an integer', 'would overflow' }

-- Calls a command on a job or a submission; nil if another program has damaged that, so that it ends
-- no script that others need. Any other error is one: a user who may not read a record must not be
-- told that it is damaged.
local function call_if_sound(...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  for _, damage in ipairs(DAMAGES) do
    if string.find(reply.err, damage, 1, true) then return nil end
  end
  error(reply)
end

-- Counts jobs of an adapter, in WAITING or RUNNING; what came down to nothing is deleted.
local function count_of_adapter(key, adapter, number)
  if redis.call('HINCRBY', key, adapter, number) <= 0 then redis.call('HDEL', key, adapter) end
end

-- Counts jobs that came to wait, or wait no longer (a negative number), and the bytes of their records.
-- What another program has left there instead goes, and with it what was counted by then: the count is
-- too low until what waits now has gone.
local function count_backlog(number, bytes)
  -- Not -bytes: Lua's -0 is no integer to Redis 7.0.
  local num_bytes = call_if_sound('HINCRBY', BACKLOG, 'bytes', number < 0 and 0 - bytes or bytes)
  local num_jobs = num_bytes and call_if_sound('HINCRBY', BACKLOG, 'jobs', number)
  if num_jobs and num_jobs > 0 then return end
  local is_hash = call_if_sound('HDEL', BACKLOG, 'jobs', 'bytes')
  if not is_hash then
    if number < 0 then redis.call('DEL', BACKLOG) end -- Who only submits has no right to that.
  elseif not num_jobs and number > 0 then
    count_backlog(number, bytes)
  end
end

-- Counts jobs that came to be in a state, or left it (a negative number), and the bytes of their
-- records if that is `waiting`.
local function count(state, adapter, number, bytes)
  local by_adapter = ({ waiting = WAITING, running = RUNNING })[state]
  if not by_adapter or number == 0 then return end
  count_of_adapter(by_adapter, adapter, number)
  if state == 'waiting' then count_backlog(number, bytes) end
end

-- Makes the notice of a submission's end due, under an id that no other has. A submission that a
-- replay opens again has nothing to tell until it ends again.
local function set_notice(submission, num_ended)
  local key = SUBMISSION .. submission
  local event, total = unpack(redis.call('HMGET', key, 'webhook_event', 'total'))
  local has_ended = num_ended >= (tonumber(total) or 0)
  if has_ended and not event then
    redis.call('HSET', key, 'webhook_event', redis.sha1hex(key .. ' ' .. text(now_us())),
      'webhook_ended', text(now_ms()), 'webhook_state', 'pending')
    redis.call('ZADD', NOTICES, text(now_ms()), submission)
  elseif event and not has_ended then
    redis.call('HDEL', key, 'webhook_event', 'webhook_ended', 'webhook_state', 'webhook_attempts',
      'webhook_first_try', 'webhook_next_try', 'webhook_error', 'webhook_settled')
    redis.call('ZREM', NOTICES, submission)
  end
end

-- Lets a submission expire once all jobs that it holds have ended, and its time to live is over; and
-- has its webhook told, if it has one, once that are all that it will hold.
local function note_whether_ended(submission)
  local key, num_ended = SUBMISSION .. submission, 0
  local num_jobs = call_if_sound('LLEN', key .. ':jobs')
  local fields = call_if_sound('HMGET', key, 'result_ttl', 'webhook', 'done', 'failed', 'dead',
    'cancelled', 'expired')
  if not num_jobs or not fields then return end
  local ttl, webhook = tonumber(fields[1] or ''), fields[2]
  for i = 3, #fields do num_ended = num_ended + (tonumber(fields[i] or '') or 0) end
  if ttl and num_ended >= num_jobs then
    redis.call('ZADD', EXPIRY, text(now_ms() + ttl), submission)
  else
    redis.call('ZREM', EXPIRY, submission)
  end
  if webhook then set_notice(submission, num_ended) end
end

-- Tells those who follow a submission that a job of it has finished. Where a dead job was told is
-- kept, so that a replay can take it back.
local function tell_finished(submission, id, state)
  local entry = call_if_sound('XADD', SUBMISSION .. submission .. ':finished', '*', 'id', id)
  if entry and state == 'dead' then
    local told = redis.call('HGET', JOB .. id, 'told') or ''
    redis.call('HSET', JOB .. id, 'told', told .. submission .. ' ' .. entry .. ' ')
  end
end

-- Adds to a submission's count of jobs in a state; returns it.
local function add_to_count(submission, state, number)
  return call_if_sound('HINCRBY', SUBMISSION .. submission, state, number)
end

-- Counts that jobs of a submission came from one state to another.
local function count_moved(submission, from, to, number)
  local num_left = add_to_count(submission, from, -number) or 0
  add_to_count(submission, to, number)
  -- While others are in the state that these left, none of them is the last one to end.
  if TERMINAL[from] or TERMINAL[to] and num_left <= 0 then note_whether_ended(submission) end
end

-- Counts the change of a job's state in every submission it belongs to. One that sent the job twice
-- is named twice, so its counts always add up to its number of lines.
local function tell_submissions(id, submissions, from, to)
  for submission in string.gmatch(submissions, '%S+') do
    if TERMINAL[to] then tell_finished(submission, id, to) end
    count_moved(submission, from, to, 1)
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

-- The lane of a job; nil if its record was deleted underneath. One of version 1 has no priority.
local function lane_of(id)
  local adapter, priority, submissions =
    unpack(redis.call('HMGET', JOB .. id, 'adapter', 'priority', 'submissions'))
  return adapter and lane_in(adapter, priority or DEFAULT_PRIORITY, string.match(submissions, '%S+'))
end

-- Lanes have waiting jobs: each takes its turn in its band, and its adapter among the others unless
-- it is paused.
local function open_lanes(lanes)
  local now, some_are_paused = text(now_us()), redis.call('EXISTS', PAUSED) == 1
  local ready = {}
  for _, lane in pairs(lanes) do
    redis.call('ZADD', LANES .. lane.band, 'NX', now, lane.submission)
    if not some_are_paused or redis.call('HEXISTS', PAUSED, lane.adapter) == 0 then
      ready[lane.priority] = ready[lane.priority] or {}
      table.insert(ready[lane.priority], now)
      table.insert(ready[lane.priority], lane.adapter)
    end
  end
  for priority, adapters in pairs(ready) do
    in_pieces(adapters, function(...) redis.call('ZADD', READY .. priority, 'NX', ...) end)
  end
end

local function close_lane(lane)
  local was_open = redis.call('ZREM', LANES .. lane.band, lane.submission) == 1
  if was_open and redis.call('EXISTS', LANES .. lane.band) == 0 then
    redis.call('ZREM', READY .. lane.priority, lane.adapter)
  end
end

-- Takes entries out of their lane: deleted when they are acknowledged, so XLEN is waiting + in flight.
local function drop_entries(lane, entries)
  in_pieces(entries, function(...)
    redis.call('XACK', lane.stream, GROUP, ...)
    redis.call('XDEL', lane.stream, ...)
  end)
  if redis.call('XLEN', lane.stream) == 0 then
    redis.call('DEL', lane.stream)
    close_lane(lane)
  end
end

local function drop_entry(lane, entry)
  if lane and entry then drop_entries(lane, { entry }) end
end

-- The first entries of a lane that nobody has been given, up to `count`; they count as given now. The
-- group is made on first use, and again after a FLUSHALL.
local function read_entries(lane, count)
  local function group_read()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, GROUP, 'COUNT', count,
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

local function reads_version(version)
  return version == WIRE_VERSION or version == WIRE_VERSION - 1
end

-- The version of a record with these fields: 0 if it is damaged, so that nothing can be done with it.
local function version_of(v, adapter, submissions, attempts, deadline)
  local version = tonumber(v) or 0
  local is_damaged = not adapter or not submissions or not string.match(attempts or '', '^%d+$')
    or not string.match(deadline or '0', '^%-?%d+$')
  if version ~= version or reads_version(version) and is_damaged then return 0 end
  return version
end

-- Fields of a job; nil if its key is no hash.
local function job_fields(id, ...)
  return call_if_sound('HMGET', JOB .. id, ...)
end

-- A job's state, nil if there is no such job, and the version of its record.
local function state_and_version(id)
  local found = job_fields(id, 'state', 'v', 'adapter', 'submissions', 'attempts', 'deadline')
  if not found then return 'damaged', 0 end
  return found[1] or nil, version_of(unpack(found, 2))
end

-- A lease is held by (worker, number of its claim): no two deliveries of a job share it, so a worker
-- that lost the job and got it again does not pass for its former self. One of a damaged record
-- counts as lost, so that nobody who holds others meets it; who sweeps sets it aside.
local function holds_lease(worker, id, claim)
  local found = job_fields(id, 'state', 'worker', 'claim', 'v', 'adapter', 'submissions', 'attempts',
    'deadline')
  if not found then return false end
  local state, holder, current = unpack(found, 1, 3)
  return state == 'running' and holder == worker and current == claim
    and reads_version(version_of(unpack(found, 4)))
end

-- Leaves a job alone whose record is of a version that is not read here, until a worker sweeps that
-- reads it.
local function set_aside(id, version)
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', SUSPECTS, id)
  redis.call('ZREM', DELAYED, id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('ZADD', SET_ASIDE, version, id)
end

-- Lends a waiting job to a worker, until a moment in ms.
local function lend(id, worker, claim, until_ms)
  redis.call('HINCRBY', JOB .. id, 'attempts', 1)
  redis.call('HSET', JOB .. id, 'worker', worker, 'claim', claim, 'claimed', text(now_ms()))
  redis.call('ZADD', LEASES, text(until_ms), id)
  redis.call('ZREM', DEADLINES, id)
  set_state(id, 'running')
end

-- What the worker that has it is told of a job:
-- {id, adapter, payload, attempts, queued, submission}.
local function lent_job(id)
  local adapter, payload, attempts, queued, submissions =
    unpack(redis.call('HMGET', JOB .. id, 'adapter', 'job', 'attempts', 'queued', 'submissions'))
  -- A record without a prompt ends as a bad one where it is parsed.
  return { id, adapter, payload or '', attempts, tonumber(queued) and queued or 0,
    string.match(submissions, '%S+') or '' }
end

-- A job that waits, wherever that is, expires at its deadline.
local function heed_deadline(id)
  local deadline = redis.call('HGET', JOB .. id, 'deadline')
  if deadline then redis.call('ZADD', DEADLINES, deadline, id) end
end

-- Puts a job at the end of its lane.
local function enqueue(id)
  local lane = lane_of(id)
  redis.call('HSET', JOB .. id, 'entry', redis.call('XADD', lane.stream, '*', 'id', id))
  open_lanes({ lane })
end

-- Lets a waiting job have its turn: at the end of its lane, or, if it is to run alone, among the
-- suspects, which keep their entry.
local function wait_for_turn(id)
  heed_deadline(id)
  local entry, alone = unpack(redis.call('HMGET', JOB .. id, 'entry', 'alone'))
  if alone and entry then
    redis.call('ZADD', SUSPECTS, text(now_ms()), id)
    return
  end
  enqueue(id) -- Before the old entry goes, which may be the lane's only one.
  drop_entry(lane_of(id), entry)
end

-- Takes a running job away from its worker.
local function take_back(id)
  redis.call('ZREM', LEASES, id)
  redis.call('HDEL', JOB .. id, 'worker', 'claim', 'claimed')
  set_state(id, 'waiting')
end

-- Takes a job away from its worker that has not begun it: the attempt does not count.
local function hand_back(id)
  redis.call('HINCRBY', JOB .. id, 'attempts', -1)
  take_back(id)
  wait_for_turn(id)
end

-- Claims are numbered, so that one whose reply was lost may be repeated: it finds the jobs that it
-- brought, with leases of full length. A command that comes late finds none: its reply is not
-- awaited any more. Jobs of the other kind than is asked for now, suspects or not, are handed back.
-- Returns nil for a claim of a new number.
local function repeated_claim(worker, claim, lease, wants_suspects)
  local last = redis.call('GET', CLAIM .. worker)
  local number, ids = string.match(last or '', '^(%d+)(.*)$')
  if not number or tonumber(claim) > tonumber(number) then return nil end
  local found = {}
  if claim ~= number then return found end
  for id in string.gmatch(ids, '%S+') do
    if holds_lease(worker, id, claim) then
      if (redis.call('HEXISTS', JOB .. id, 'alone') == 1) == wants_suspects then
        redis.call('ZADD', LEASES, 'XX', text(now_ms() + lease), id)
        table.insert(found, lent_job(id))
      else
        hand_back(id)
      end
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

-- Executions of a job before it is given up on; what stands there may be damaged.
local function max_attempts()
  local number = string.match(call_if_sound('HGET', SETTINGS, 'max_attempts') or '', '^%d+$')
  return tonumber(number or DEFAULT_MAX_ATTEMPTS)
end

-- Adds how the current attempt ended to the job's history, a JSON object a line.
local function note_attempt(id, attempt, outcome, message)
  local worker, claimed, history =
    unpack(redis.call('HMGET', JOB .. id, 'worker', 'claimed', 'history'))
  local started = string.match(claimed or '', '^%d+$')
  local line = cjson.encode({ attempt = attempt, worker = worker or cjson.null,
    started = started and started / 1000 or cjson.null, ended = now_ms() / 1000,
    outcome = outcome, message = message })
  redis.call('HSET', JOB .. id, 'history', (history and history .. '\n' or '') .. line)
end

-- Ends a job that waits or runs without a result of a worker's.
local function end_job(id, state, code, message)
  local entry = redis.call('HGET', JOB .. id, 'entry')
  redis.call('HSET', JOB .. id, 'error_code', code, 'error_message', message,
    'finished', text(now_ms()))
  redis.call('HDEL', JOB .. id, 'entry', 'claim', 'alone', 'reserved')
  for _, set in ipairs({ LEASES, DEADLINES, SUSPECTS, DELAYED, SET_ASIDE }) do
    redis.call('ZREM', set, id)
  end
  set_state(id, state)
  drop_entry(lane_of(id), entry)
end

-- Ends a waiting job whose deadline has come.
local function expire(id)
  local queued, deadline = unpack(redis.call('HMGET', JOB .. id, 'queued', 'deadline'))
  local seconds = (deadline - (tonumber(queued) or deadline)) / 1000
  local when = seconds < 0 and ' s before it was sent' or ' s after it was sent, came while it waited'
  end_job(id, 'expired', 'expired',
    string.format('not run: its deadline, %.1f', math.abs(seconds)) .. when)
end

-- Ends a waiting job whose record is gone, or damaged so that nothing can be done with it. Its lane says
-- what the record does not, so that its submissions end and who follows them is told.
local function fail_damaged(id, lane, entry, message)
  local key = JOB .. id
  local found = job_fields(id, 'submissions', 'attempts', 'queued')
  if not found then
    redis.call('DEL', key)
    found = {}
  end
  local submissions, attempts, queued = found[1] or lane.submission, found[2], found[3]
  local bytes = redis.call('HSTRLEN', key, 'job')
  redis.call('HSET', key, 'v', WIRE_VERSION, 'adapter', lane.adapter, 'priority', lane.priority,
    'submissions', submissions, 'state', 'failed', 'finished', text(now_ms()),
    'attempts', string.match(attempts or '', '^%d+$') or 0,
    'queued', string.match(queued or '', '^%d+$') or string.match(entry, '^%d+'),
    'error_code', 'bad_record', 'error_message', 'the stored job is damaged: ' .. message)
  redis.call('HDEL', key, 'entry', 'claim', 'alone')
  for _, set in ipairs({ LEASES, DEADLINES, SUSPECTS, DELAYED, SET_ASIDE }) do
    redis.call('ZREM', set, id)
  end
  count('waiting', lane.adapter, -1, bytes)
  tell_submissions(id, submissions, 'waiting', 'failed')
  drop_entry(lane, entry)
end

-- What workers that ended cannot have said themselves stands on a dead job as this code.
local UNTOLD = { lease_expired = true, engine_failed = true }

-- Ends a running job that has been tried often enough.
local function give_up(id, attempts, outcome, message)
  local entry = redis.call('HGET', JOB .. id, 'entry')
  local reason = 'given up after ' .. attempts .. (attempts == 1 and ' attempt' or ' attempts') ..
    '; how the last one ended: ' .. message
  local dead = redis.call('XADD', DEAD, '*', 'id', id, 'reason', reason, 'attempts', attempts)
  redis.call('HSET', JOB .. id, 'error_code', UNTOLD[outcome] and 'attempts_exhausted' or outcome,
    'error_message', reason, 'finished', text(now_ms()), 'dead', dead)
  set_state(id, 'dead')
  redis.call('ZREM', LEASES, id)
  drop_entry(lane_of(id), entry)
  redis.call('HDEL', JOB .. id, 'entry', 'claim')
end

-- Ends an attempt of a running job that brought no result. The job is tried again, `delay` ms later,
-- and without others beside it if it is to run `alone`; or it is given up if that was its last
-- attempt. Returns whether it is tried again.
local function end_attempt(id, outcome, message, alone, delay)
  local attempts = tonumber(redis.call('HGET', JOB .. id, 'attempts') or 0)
  note_attempt(id, attempts, outcome, message)
  if alone then
    redis.call('HSET', JOB .. id, 'alone', 1)
  else
    redis.call('HDEL', JOB .. id, 'alone')
  end
  if attempts >= max_attempts() then
    give_up(id, attempts, outcome, message)
    return false
  end
  take_back(id)
  if delay > 0 then
    redis.call('ZADD', DELAYED, text(now_ms() + delay), id)
    heed_deadline(id)
  else
    wait_for_turn(id)
  end
  return true
end

-- Whether a job's field `reserved` was written after a moment, by a worker that lives.
local function is_reserved(reserved, moment)
  local since, holder = string.match(reserved or '', '^(%d+) (.*)$')
  return since and tonumber(since) > moment and redis.call('EXISTS', WORKER .. holder) == 1
end

-- The suspect that waits for longest of those that a worker can run (of its adapters and of names
-- that the queue does not know, so that they fail) and that are not paused, and since when; nil if
-- there is none. One that has ended while it waited goes, and one whose deadline has come expires.
-- Passes over those, if `reserved_before` is given, that a living worker has reserved after that.
local function first_suspect(worker, reserved_before)
  if redis.call('HEXISTS', PAUSED, '*') == 1 then return nil end
  local first, window = 0, 256
  while true do
    local found = redis.call('ZRANGE', SUSPECTS, first, first + window - 1, 'WITHSCORES')
    for i = 1, #found, 2 do
      local id = found[i]
      local state, version = state_and_version(id)
      if state and not reads_version(version) then
        set_aside(id, version)
      elseif state ~= 'waiting' then
        redis.call('ZREM', SUSPECTS, id)
      else
        local adapter, deadline, reserved =
          unpack(redis.call('HMGET', JOB .. id, 'adapter', 'deadline', 'reserved'))
        local is_free = not reserved_before or not is_reserved(reserved, reserved_before)
        if deadline and tonumber(deadline) <= now_ms() then
          expire(id)
        elseif is_free and redis.call('HEXISTS', PAUSED, adapter) == 0 and (adapter == BASE
          or redis.call('HEXISTS', ADAPTERS, adapter) == 0
          or redis.call('SISMEMBER', WORKER .. worker .. ':adapters', adapter) == 1) then
          return id, tonumber(found[i + 1])
        end
      end
    end
    if #found < 2 * window then return nil end
    first = first + window
  end
end

-- An adapter's record in the desired state, nil if there is none. A null in it is cjson.null.
-- Nil too if another program has left something else there, which a load then replaces.
local function read_record(name)
  local is_json, record = pcall(cjson.decode, redis.call('HGET', ADAPTERS, name) or '')
  return is_json and type(record) == 'table' and record or nil
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

-- The newest request to fetch an adapter of that name, if it is the one of this id, or of any id.
-- Nil too if another program has left something else there.
local function read_fetch(name, id)
  local is_json, fetch = pcall(cjson.decode, redis.call('HGET', FETCHES, name) or '')
  return is_json and type(fetch) == 'table' and (not id or fetch.id == id) and fetch or nil
end

local function write_fetch(name, fetch)
  redis.call('HSET', FETCHES, name, cjson.encode(fetch))
end

local function is_over(fetch)
  return type(fetch.error) == 'string' or type(fetch.version) == 'number'
end

-- Whether an adapter keeps a slot, or shall once it is fetched. One that is being unloaded does not.
local function is_pinned(name)
  local record, fetch = read_record(name), read_fetch(name)
  return record and record.pinned == true and type(record.unloading) ~= 'string'
    or fetch and not is_over(fetch) and fetch.pinned == true or false
end

-- The other adapters that are pinned, if they are as many as may be beside none of this name: `limit`,
-- which is nil or '' where nobody knows one. nil if there is room, or if this one is pinned already.
local function pins_in_the_way(name, limit)
  if not tonumber(limit or '') or is_pinned(name) then return nil end
  local are_pinned, names = {}, {}
  for _, key in ipairs({ ADAPTERS, FETCHES }) do
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      -- Few of thousands of records hold this text, and only those are decoded.
      if string.find(fields[i + 1], '"pinned":true', 1, true) and is_pinned(fields[i]) then
        are_pinned[fields[i]] = true
      end
    end
  end
  for other in pairs(are_pinned) do table.insert(names, other) end
  table.sort(names)
  return #names >= tonumber(limit) and names or nil
end

-- Lets every worker read an adapter from a source, in place of one of that name; returns the version
-- of the desired state. `revision` is cjson.null where the first worker that reads it shall say. A
-- pin stays, whatever is loaded: an unpin or an unload ends it.
local function load_adapter(name, source, revision, wants_pin)
  local version = desired_state_changed()
  write_record(name, {
    source = source, revision = revision, pinned = wants_pin or is_pinned(name),
    unloading = cjson.null, version = version, previous = what_is_replaced(name),
  })
  return version
end
