-- Prolongs leases.
--   ARGV: worker, lease in ms, then (id, claim) a job
--   Returns the ids whose lease the worker no longer holds.
local worker, until_ms = ARGV[1], text(now_ms() + ARGV[2])
local held, lost = {}, {}
for i = 3, #ARGV, 2 do
  if holds_lease(worker, ARGV[i], ARGV[i + 1]) then
    table.insert(held, until_ms)
    table.insert(held, ARGV[i])
  else
    table.insert(lost, ARGV[i])
  end
end
in_pieces(held, function(...) redis.call('ZADD', LEASES, 'XX', ...) end)
return lost
