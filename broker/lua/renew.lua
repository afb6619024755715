-- Prolongs leases.
--   ARGV: worker, lease in ms, then (id, claim) a job
--   Returns the ids whose lease the worker no longer holds.
local worker, until_ms = ARGV[1], now_ms() + tonumber(ARGV[2])
local lost = {}
for i = 3, #ARGV, 2 do
  if holds_lease(worker, ARGV[i], ARGV[i + 1]) then
    redis.call('ZADD', LEASES, 'XX', text(until_ms), ARGV[i])
  else
    table.insert(lost, ARGV[i])
  end
end
return lost
