-- Gives whoever delivers webhooks the notices that are due. Each is due again after a while, should
-- nothing come of it.
--   ARGV: how many, ms until they are due again
--   Returns {submission, event, ...}, those first that have been due for longest.
-- Safe to repeat: notices whose reply was lost are given once they are due again.
local limit, again = ARGV[1], text(now_ms() + ARGV[2])
local taken = {}
for _, submission in ipairs(redis.call('ZRANGEBYSCORE', NOTICES, '-inf', text(now_ms()),
    'LIMIT', 0, limit)) do
  local found = redis.pcall('HMGET', SUBMISSION .. submission, 'webhook_state', 'webhook_event')
  local state, event = found[1], found[2] -- Neither if the key is no hash.
  -- The event names an rq job, whose ids are of these letters.
  if state == 'pending' and string.match(event or '', '^[%w_-]+$') and #event <= 128 then
    redis.call('ZADD', NOTICES, again, submission)
    table.insert(taken, submission)
    table.insert(taken, event)
  else
    redis.call('ZREM', NOTICES, submission)
  end
end
return taken
