-- Writes something after all jobs of a submission, so that whoever then waits for this write to be
-- on disk (WAITAOF) knows that they are, also over a connection that did not send them.
--   ARGV: submission, its number of jobs
--   Returns how many of them the server holds; it has written only if these are all.
-- Safe to repeat.
local submission, total = ARGV[1], tonumber(ARGV[2])
local sent = redis.call('LLEN', SUBMISSION .. submission .. ':jobs')
if sent == total then redis.call('HSET', SUBMISSION .. submission, 'durable', 1) end
return sent
