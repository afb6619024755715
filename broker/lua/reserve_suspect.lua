-- Says whether a busy worker shall finish what it has, and then run suspects: if the first one that
-- it can run has waited beyond the patience. That one then waits anew, so that other workers go on
-- with their work unless there are more suspects, or this worker dies before it comes to it.
--   ARGV: worker, patience in ms
--   Returns 1 or 0.
local worker, patience = ARGV[1], tonumber(ARGV[2])
local id, since = first_suspect(worker)
if not id or now_ms() - since <= patience then return 0 end
redis.call('ZADD', SUSPECTS, text(now_ms()), id)
return 1
