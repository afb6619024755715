-- Says whether a busy worker shall finish what it has, and then run suspects: if the first one that
-- it can run, and for which no other worker makes itself free, has waited beyond the patience. That
-- one is then reserved for as long, so that other workers go on with their work unless there are
-- more suspects, or this worker dies before it comes to it. It keeps its place: were it put behind
-- the others, those that come meanwhile would be run before it again and again.
--   ARGV: worker, patience in ms
--   Returns 1 or 0.
local worker, patience = ARGV[1], tonumber(ARGV[2])
local long_ago = now_ms() - patience
local id, since = first_suspect(worker, long_ago)
if not id or since >= long_ago then return 0 end
redis.call('HSET', JOB .. id, 'reserved', text(now_ms()) .. ' ' .. worker)
return 1
