-- Lets jobs that were given up on run again, with a fresh count of attempts; their history stays.
--   ARGV: ids
--   Returns how many wait now; those that are not among the dead letters are left as they are.
-- Safe to repeat.
local num_replayed = 0
for _, id in ipairs(ARGV) do
  local state, version = state_and_version(id)
  local dead, told = unpack(job_fields(id, 'dead', 'told') or {})
  if state == 'dead' and dead and reads_version(version) then
    redis.call('XDEL', DEAD, dead)
    for submission, entry in string.gmatch(told or '', '(%S+) (%S+)') do
      redis.call('XDEL', SUBMISSION .. submission .. ':finished', entry)
    end
    redis.call('HDEL', JOB .. id, 'error_code', 'error_message', 'finished', 'dead', 'told',
      'worker', 'claimed')
    redis.call('HSET', JOB .. id, 'attempts', 0)
    set_state(id, 'waiting')
    heed_deadline(id)
    enqueue(id)
    num_replayed = num_replayed + 1
  end
end
if num_replayed > 0 then redis.call('PUBLISH', WAKE, 'replay') end
return num_replayed
