-- Hands back jobs that their worker has not begun: they wait again, and lose no attempt.
--   ARGV: worker, then (id, claim) a job
--   Returns how many were handed back.
-- Safe to repeat.
local worker, num_released = ARGV[1], 0
for i = 2, #ARGV, 2 do
  if holds_lease(worker, ARGV[i], ARGV[i + 1]) then
    hand_back(ARGV[i])
    num_released = num_released + 1
  end
end
if num_released > 0 then redis.call('PUBLISH', WAKE, worker) end
return num_released
