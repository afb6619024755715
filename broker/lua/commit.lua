-- Records the one result of a job, if the worker still holds its lease.
--   ARGV: worker, id, claim, state, result
--   Returns 1 if the result is on record, 0 if the lease was lost.
-- Safe to repeat: a result that is on record already counts as recorded.
local worker, id, claim, state, result = unpack(ARGV)
if not holds_lease(worker, id, claim) then
  return redis.call('HGET', JOB .. id, 'result') == result and 1 or 0
end
local entry = redis.call('HGET', JOB .. id, 'entry')
redis.call('HSET', JOB .. id, 'result', result)
redis.call('HDEL', JOB .. id, 'entry', 'claim', 'alone')
set_state(id, state)
redis.call('ZREM', LEASES, id)
drop_entry(lane_of(id), entry)
return 1
