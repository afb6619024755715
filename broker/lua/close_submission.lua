-- Lets a submission take no more jobs: it is to be cancelled, perhaps while it is still sent. What it
-- holds by now is its total.
--   ARGV: submission
-- Safe to repeat.
local submission = SUBMISSION .. ARGV[1]
if redis.call('TYPE', submission).ok ~= 'hash' then return end
redis.call('HSET', submission, 'closed', text(now_ms()),
  'total', redis.call('LLEN', submission .. ':jobs'))
