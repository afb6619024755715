-- Writes down how a try to deliver a notice ended.
--   ARGV: submission, event, number of the try, 'delivered' | 'failed' | 'dead' (no use to try
--         again), why, ms to the next try, ms after the end of the first try from which none is made
--   Returns the state of the notice now: 'pending', 'delivered' or 'dead'; '' if the event is no
--   longer that of the submission.
-- Safe to repeat.
local submission, event, attempt, outcome, reason, delay, lifetime = unpack(ARGV)
local key, now = SUBMISSION .. submission, now_ms()
local found = redis.pcall('HMGET', key, 'webhook_event', 'webhook_state', 'webhook_attempts',
  'webhook_first_try')
if found.err or found[1] ~= event then return '' end
local state, attempts, first_try = found[2], tonumber(found[3]) or 0, tonumber(found[4]) or now
if state ~= 'pending' then return state end
if outcome ~= 'dead' and attempts >= tonumber(attempt) then return state end

redis.call('HSET', key, 'webhook_attempts', attempt, 'webhook_first_try', text(first_try))
local next_try = now + delay
if outcome == 'failed' and next_try > first_try + lifetime then
  outcome = 'dead'
end
if outcome == 'failed' then
  redis.call('HSET', key, 'webhook_error', reason, 'webhook_next_try', text(next_try))
  redis.call('ZADD', NOTICES, text(next_try), submission)
  return 'pending'
end
redis.call('HDEL', key, 'webhook_next_try', 'webhook_error')
if outcome == 'dead' then redis.call('HSET', key, 'webhook_error', reason) end
redis.call('HSET', key, 'webhook_state', outcome, 'webhook_settled', text(now))
redis.call('ZREM', NOTICES, submission)
return outcome
