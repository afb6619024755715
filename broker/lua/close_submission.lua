-- Lets a submission take no more jobs: it is to be cancelled, perhaps while it is still sent. What it
-- holds by now is its total.
--   ARGV: submission
-- Safe to repeat.
local submission, key = ARGV[1], SUBMISSION .. ARGV[1]
if redis.call('TYPE', key).ok ~= 'hash' then return end
local num_jobs = redis.call('LLEN', key .. ':jobs')
local was_sent = tonumber(redis.call('HGET', key, 'total') or '') == num_jobs
redis.call('HSET', key, 'closed', text(now_ms()), 'total', num_jobs)
-- What had been sent may all have ended before, so that no job is left to tell of the end.
if not was_sent then note_whether_ended(submission) end
