-- Ends attempts that brought no result. The jobs are tried again, or, once they have been tried often
-- enough, given up on.
--   ARGV: worker, outcome (a code), message, '1' if they are to run alone from now on, else '0',
--         ms to the next attempt, then (id, claim) a job
--   Returns {number to be tried again, number given up}.
-- Safe to repeat.
local worker, outcome, message = ARGV[1], ARGV[2], ARGV[3]
local alone, delay = ARGV[4] == '1', tonumber(ARGV[5])
local again, given_up = 0, 0
for i = 6, #ARGV, 2 do
  local id = ARGV[i]
  if holds_lease(worker, id, ARGV[i + 1]) then
    if end_attempt(id, outcome, message, alone, delay) then
      again = again + 1
    else
      given_up = given_up + 1
    end
  end
end
if again > 0 then redis.call('PUBLISH', WAKE, worker) end
return { again, given_up }
