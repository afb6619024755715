-- Stores a run of a submission's jobs, all or none.
--   ARGV: submission, its name, its number of jobs, offset of the run in it,
--         then (id, adapter, priority, deadline, payload) a job; a
--         deadline is '', a moment in ms, or with a '+' before it ms from now
--   Returns {'ok'} | {'conflict', index, ...}: indices (from 0) of jobs whose id is taken by a
--   job of other content | {'gap', sent}: jobs before the offset are missing | {'cancelled', sent}:
--   the submission was cancelled meanwhile.
-- Safe to repeat: a run that the submission already holds is not added again.
local submission, name, total, offset = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local num_jobs = (#ARGV - 4) / 5
local jobs = SUBMISSION .. submission .. ':jobs'

local sent = redis.call('LLEN', jobs)
if sent >= offset + num_jobs then return { 'ok' } end
if redis.call('HEXISTS', SUBMISSION .. submission, 'closed') == 1 then
  return { 'cancelled', sent }
end
if sent ~= offset then return { 'gap', sent } end

local reply, payloads = { 'conflict' }, {}
for i = 0, num_jobs - 1 do
  local id, payload = ARGV[5 + 5 * i], ARGV[9 + 5 * i]
  local stored = payloads[id] or redis.call('HGET', JOB .. id, 'job')
  if stored and stored ~= payload then table.insert(reply, i) end
  payloads[id] = payload
end
if #reply > 1 then return reply end

local now = now_ms()
if offset == 0 then
  redis.call('HSET', SUBMISSION .. submission, 'name', name, 'total', total, 'created', text(now))
  redis.call('ZADD', SUBMISSIONS, text(now), submission)
end

local function moment_of(deadline)
  local from_now = string.match(deadline, '^%+(%d+)$')
  return from_now and text(now + from_now) or deadline
end

local lanes = {}

-- Stores a job at the end of its lane.
local function add(id, adapter, priority, deadline, payload)
  local lane = lane_in(adapter, priority, submission)
  lane = lanes[lane.band] or lane
  lanes[lane.band] = lane
  lane.num_jobs, lane.num_bytes = (lane.num_jobs or 0) + 1, (lane.num_bytes or 0) + #payload
  redis.call('HSET', JOB .. id, 'v', WIRE_VERSION, 'job', payload, 'adapter', adapter,
    'priority', priority, 'state', 'waiting', 'submissions', submission, 'queued', text(now),
    'attempts', 0, 'entry', redis.call('XADD', lane.stream, '*', 'id', id))
  if deadline ~= '' then
    deadline = moment_of(deadline)
    redis.call('HSET', JOB .. id, 'deadline', deadline)
    redis.call('ZADD', DEADLINES, deadline, id)
  end
end

for i = 0, num_jobs - 1 do
  local id, adapter, priority, deadline, payload = unpack(ARGV, 5 + 5 * i, 9 + 5 * i)
  local state, submissions = unpack(redis.call('HMGET', JOB .. id, 'state', 'submissions'))
  if state then
    redis.call('HSET', JOB .. id, 'submissions', submissions .. ' ' .. submission)
    if TERMINAL[state] then
      redis.call('XADD', SUBMISSION .. submission .. ':finished', '*', 'id', id)
    end
  else
    add(id, adapter, priority, deadline, payload)
  end
  redis.call('HINCRBY', SUBMISSION .. submission, state or 'waiting', 1)
  redis.call('RPUSH', jobs, id)
end
for _, lane in pairs(lanes) do
  open_lane(lane)
  count('waiting', lane.adapter, lane.num_jobs, lane.num_bytes)
end
redis.call('PUBLISH', WAKE, submission)
return { 'ok' }
