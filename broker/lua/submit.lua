-- Stores a run of a submission's jobs, all or none.
--   ARGV: submission, its name, its number of jobs, offset of the run in it,
--         then (id, adapter, payload) a job
--   Returns {'ok'} | {'conflict', index, ...}: indices (from 0) of jobs whose id is taken by a
--   job of other content | {'gap', sent}: jobs before the offset are missing.
-- Safe to repeat: a run that the submission already holds is not added again.
local submission, name, total, offset = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local count = (#ARGV - 4) / 3
local jobs = SUBMISSION .. submission .. ':jobs'

local sent = redis.call('LLEN', jobs)
if sent >= offset + count then return { 'ok' } end
if sent ~= offset then return { 'gap', sent } end

local reply, payloads = { 'conflict' }, {}
for i = 0, count - 1 do
  local id, payload = ARGV[5 + 3 * i], ARGV[7 + 3 * i]
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
for i = 0, count - 1 do
  local id, adapter, payload = ARGV[5 + 3 * i], ARGV[6 + 3 * i], ARGV[7 + 3 * i]
  local state, submissions = unpack(redis.call('HMGET', JOB .. id, 'state', 'submissions'))
  if state then
    redis.call('HSET', JOB .. id, 'submissions', submissions .. ' ' .. submission)
    if TERMINAL[state] then tell_finished(submission, id, state) end
  else
    state = 'waiting'
    redis.call('HSET', JOB .. id, 'v', WIRE_VERSION, 'job', payload, 'adapter', adapter,
      'state', state, 'submissions', submission, 'queued', text(now), 'attempts', 0)
    enqueue(id, adapter)
  end
  redis.call('HINCRBY', SUBMISSION .. submission, state, 1)
  redis.call('RPUSH', jobs, id)
end
redis.call('PUBLISH', WAKE, submission)
return { 'ok' }
