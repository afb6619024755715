-- Hands jobs back. They wait again, or, once they have been tried often enough, are given up on.
--   ARGV: worker, '1' if this attempt counts, else '0', attempts allowed, then (id, claim) a job
--   Returns {number made to wait again, number given up}.
local worker, counts, max_attempts = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local again, given_up = 0, 0
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  if holds_lease(worker, id, ARGV[i + 1]) then
    if not counts then redis.call('HINCRBY', JOB .. id, 'attempts', -1) end
    if try_again(id, max_attempts) then again = again + 1 else given_up = given_up + 1 end
  end
end
if again > 0 then redis.call('PUBLISH', WAKE, worker) end
return { again, given_up }
