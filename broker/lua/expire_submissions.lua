-- Deletes jobs, with their results, of submissions that have expired; a job goes with the last of the
-- submissions that sent it. A submission's counts stay for a while, so that its end can be told.
--   ARGV: how many jobs to look at, ms for which the counts stay
--   Returns how many jobs it looked at, or submissions without jobs; below the limit, none is left.
-- Safe to repeat.
local limit, counts_stay = tonumber(ARGV[1]), ARGV[2]
local now, num_seen = text(now_ms()), 0

-- The submission is named once for each of its lines.
local function forget(id, submission)
  local submissions = call_if_sound('HGET', JOB .. id, 'submissions')
  if not submissions then return end
  local others, found = {}, false
  for name in string.gmatch(submissions, '%S+') do
    if name == submission and not found then found = true else table.insert(others, name) end
  end
  if #others == 0 then
    local dead = redis.call('HGET', JOB .. id, 'dead')
    if dead then redis.call('XDEL', DEAD, dead) end
    return redis.call('DEL', JOB .. id)
  end
  redis.call('HSET', JOB .. id, 'submissions', table.concat(others, ' '))
end

-- Whoever were told by now could not fetch the results any more.
local function drop_notice(submission)
  local was_due = redis.call('ZREM', NOTICES, submission) == 1
  if not was_due or redis.call('EXISTS', SUBMISSION .. submission) == 0 then return end
  call_if_sound('HSET', SUBMISSION .. submission, 'webhook_state', 'dead', 'webhook_error',
    'the results expired before it was delivered', 'webhook_settled', now)
end

local function expire_submission(submission)
  local key = SUBMISSION .. submission
  if redis.call('EXISTS', key) == 1 then call_if_sound('HSETNX', key, 'expired_at', now) end
  redis.call('ZREM', SUBMISSIONS, submission)
  local ids = call_if_sound('LPOP', key .. ':jobs', limit - num_seen)
  if ids == nil then redis.call('DEL', key .. ':jobs') end
  ids = ids or {}
  for _, id in ipairs(ids) do forget(id, submission) end
  num_seen = num_seen + math.max(1, #ids)
  if redis.call('EXISTS', key .. ':jobs') == 0 then
    redis.call('UNLINK', key .. ':finished')
    redis.call('ZREM', EXPIRY, submission)
    drop_notice(submission)
    redis.call('PEXPIRE', key, counts_stay)
  end
end

local due = redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', now, 'LIMIT', 0, limit)
for _, submission in ipairs(due) do
  if num_seen < limit then expire_submission(submission) end
end
return num_seen
