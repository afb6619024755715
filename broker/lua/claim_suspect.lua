-- Gives a worker that holds no job the suspect that waits for longest of those that it can run.
--   ARGV: worker, number of this claim, lease in ms
--   Returns {now, jobs}: at most one job, as claim.lua gives it.
-- Safe to repeat, with the same number, until the next claim.
local worker, claim, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()
local jobs = repeated_claim(worker, claim, lease, true)
if jobs then return { text(now), jobs } end
jobs = {}
local id = first_suspect(worker)
if id then
  redis.call('ZREM', SUSPECTS, id)
  redis.call('HDEL', JOB .. id, 'reserved')
  lend(id, worker, claim, now + lease)
  jobs = { lent_job(id) }
end
note_claim(worker, claim, lease, jobs)
return { text(now), jobs }
