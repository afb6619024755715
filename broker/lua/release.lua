-- Hands jobs back: they wait again.
--   ARGV: worker, '1' if the attempt counts, else '0', then (id, entry) a job
--   Returns how many were handed back.
local worker, counts = ARGV[1], ARGV[2] == '1'
local released = 0
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  if holds_lease(worker, id, ARGV[i + 1]) then
    if not counts then redis.call('HINCRBY', JOB .. id, 'attempts', -1) end
    requeue(id)
    released = released + 1
  end
end
if released > 0 then redis.call('PUBLISH', WAKE, worker) end
return released
