-- Stores a run of a submission's jobs, all or none.
--   ARGV: submission, its name, its number of jobs, offset of the run in it, ms for which results are
--         kept, jobs behind the run that must find room too, their bytes, URL of
--         the webhook that is told of the end ('' if none is),
--         then (id, adapter, priority, deadline, payload, refusal) a job; a deadline is '', a moment in
--         ms, or with a '+' before it ms from now; a refusal is '', or why the job has failed already
--   Returns {'ok'} | {'conflict', index, ...}: indices (from 0) of jobs whose id is taken by a
--   job of other content | {'gap', sent}: jobs before the offset are missing | {'cancelled', sent}:
--   the submission was cancelled meanwhile | {'full', fitting, jobs, bytes, max jobs, max bytes}: so
--   many jobs of the run, the first ones, would find room beside the jobs and bytes that wait, and
--   these are the limits ('' if there is none) | {'damaged', how}: no limit can be told.
-- Safe to repeat: a run that the submission already holds is not added again.
local submission, name, total, offset, result_ttl = unpack(ARGV, 1, 5)
local rest_jobs, rest_bytes, first = tonumber(ARGV[6]), tonumber(ARGV[7]), 9
offset = tonumber(offset)
local webhook, num_jobs = ARGV[8], (#ARGV - 8) / 6
local jobs = SUBMISSION .. submission .. ':jobs'

local sent = redis.call('LLEN', jobs)
if sent >= offset + num_jobs then return { 'ok' } end
if redis.call('HEXISTS', SUBMISSION .. submission, 'closed') == 1 then
  return { 'cancelled', sent }
end
if sent ~= offset then return { 'gap', sent } end

-- A count; 0 where another program has left something else.
local function whole_number(digits)
  return string.match(digits or '', '^%d+$') and #digits < 16 and tonumber(digits) or 0
end

local backlog = call_if_sound('HMGET', BACKLOG, 'jobs', 'bytes') or {}
local waiting_jobs, waiting_bytes = whole_number(backlog[1]), whole_number(backlog[2])
local limits = call_if_sound('HMGET', LIMITS, 'jobs', 'bytes')
local max_jobs, max_bytes = unpack(limits or {})

local damage = not limits and 'it is no hash'
for _, limit in ipairs({ max_jobs or '0', max_bytes or '0' }) do
  if not string.match(limit, '^%d+$') then damage = "'" .. limit .. "' is no number" end
end
if damage then return { 'damaged', damage } end

local function has_room(num_new, bytes)
  return (not max_jobs or waiting_jobs + num_new <= tonumber(max_jobs))
    and (not max_bytes or waiting_bytes + bytes <= tonumber(max_bytes))
end

local IS_PRIORITY = {}
for _, priority in ipairs(PRIORITIES) do IS_PRIORITY[priority] = true end

-- What is stored wrong would fail later, in a script that other jobs need.
if num_jobs % 1 ~= 0 then return redis.error_reply('ERR six arguments a job are needed') end
if not string.match(result_ttl, '^%d+$') then
  return redis.error_reply('ERR no time to live: ' .. result_ttl)
end
for i = 0, num_jobs - 1 do
  local priority, deadline = unpack(ARGV, first + 6 * i + 2, first + 6 * i + 3)
  if not IS_PRIORITY[priority] then
    return redis.error_reply('ERR no such priority: ' .. priority)
  end
  if deadline ~= '' and not string.match(deadline, '^[+-]?%d+$') then
    return redis.error_reply('ERR no deadline: ' .. deadline)
  end
end

-- What is stored under each id, before this run and once it is added.
local known = {}

local function look_up(id)
  local found = job_fields(id, 'job', 'state', 'submissions')
  if not found then return { payload = '' } end -- Not free, and of other content than any job.
  local payload, state, submissions = unpack(found)
  return { payload = payload, state = state, submissions = submissions }
end

local reply, num_new, num_bytes, num_fitting = { 'conflict' }, 0, 0, 0
for i = 0, num_jobs - 1 do
  local id, payload, refusal =
    ARGV[first + 6 * i], ARGV[first + 6 * i + 4], ARGV[first + 6 * i + 5]
  known[id] = known[id] or look_up(id)
  if not known[id].payload then
    known[id].payload = payload
    if refusal == '' then num_new, num_bytes = num_new + 1, num_bytes + #payload end
  elseif known[id].payload ~= payload then
    table.insert(reply, i)
  end
  if num_new == 0 or has_room(num_new, num_bytes) then num_fitting = i + 1 end
end
if #reply > 1 then return reply end
-- What adds nothing needs no room.
if num_new > 0 and not has_room(num_new + rest_jobs, num_bytes + rest_bytes) then
  return { 'full', num_fitting, waiting_jobs, waiting_bytes, max_jobs or '', max_bytes or '' }
end

local now = now_ms()
local queued = text(now)
if offset == 0 then
  redis.call('HSET', SUBMISSION .. submission, 'name', name, 'total', total, 'created', queued,
    'result_ttl', result_ttl)
  if webhook ~= '' then redis.call('HSET', SUBMISSION .. submission, 'webhook', webhook) end
  redis.call('ZADD', SUBMISSIONS, queued, submission)
end

local function moment_of(deadline)
  local from_now = string.match(deadline, '^%+(%d+)$')
  return from_now and text(now + from_now) or deadline
end

-- A job is counted where it is stored: one whose record has lost its payload counts as new above, as
-- it may need room, and is not stored again.
local lanes, num_added, num_added_bytes = {}, 0, 0

local function lane_for(adapter, priority)
  local band = adapter .. ':' .. priority
  if not lanes[band] then
    lanes[band] = lane_in(adapter, priority, submission)
    lanes[band].num_jobs = 0
  end
  return lanes[band]
end

-- Stores a job at the end of its lane; the lane is opened, and its jobs counted, once for the run.
local function add(id, adapter, priority, deadline, payload)
  local lane = lane_for(adapter, priority)
  lane.num_jobs = lane.num_jobs + 1
  num_added, num_added_bytes = num_added + 1, num_added_bytes + #payload
  redis.call('HSET', JOB .. id, 'v', WIRE_VERSION, 'job', payload, 'adapter', adapter,
    'priority', priority, 'state', 'waiting', 'submissions', submission, 'queued', queued,
    'attempts', 0, 'entry', redis.call('XADD', lane.stream, '*', 'id', id))
  if deadline ~= '' then
    deadline = moment_of(deadline)
    redis.call('HSET', JOB .. id, 'deadline', deadline)
    redis.call('ZADD', DEADLINES, deadline, id)
  end
end

-- Stores a job that was refused before it was sent: it has ended, and stands in no lane.
local function add_refused(id, payload, refusal)
  redis.call('HSET', JOB .. id, 'v', WIRE_VERSION, 'job', payload, 'adapter', BASE,
    'state', 'failed', 'submissions', submission, 'queued', queued, 'finished', queued,
    'attempts', 0, 'error_code', 'bad_line', 'error_message', refusal)
  tell_finished(submission, id, 'failed')
end

local ids, num_by_state = {}, {}
for i = 0, num_jobs - 1 do
  local id, adapter, priority, deadline, payload, refusal =
    unpack(ARGV, first + 6 * i, first + 6 * i + 5)
  local job = known[id]
  local state = job.state or (refusal == '' and 'waiting' or 'failed')
  if job.state then
    job.submissions = job.submissions .. ' ' .. submission
    redis.call('HSET', JOB .. id, 'submissions', job.submissions)
    if TERMINAL[state] then tell_finished(submission, id, state) end
  else
    if refusal == '' then
      add(id, adapter, priority, deadline, payload)
    else
      add_refused(id, payload, refusal)
    end
    job.state, job.submissions = state, submission
  end
  num_by_state[state] = (num_by_state[state] or 0) + 1
  table.insert(ids, id)
end
in_pieces(ids, function(...) redis.call('RPUSH', jobs, ...) end)
for state, number in pairs(num_by_state) do
  add_to_count(submission, state, number)
end
open_lanes(lanes)
for _, lane in pairs(lanes) do count_of_adapter(WAITING, lane.adapter, lane.num_jobs) end
if num_added > 0 then count_backlog(num_added, num_added_bytes) end
note_whether_ended(submission)
redis.call('PUBLISH', WAKE, submission)
return { 'ok' }
