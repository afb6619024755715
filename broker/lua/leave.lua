-- Takes a worker that ends off the list of living ones, and hands back what its last claim brought
-- if the reply was lost and the worker ends before it could ask again.
--   ARGV: worker, number of the claim whose reply it awaits, or of the next one
-- Safe to repeat.
local worker, awaited = ARGV[1], ARGV[2]
local claim, ids = string.match(redis.call('GET', CLAIM .. worker) or '', '^(%d+)(.*)$')
for id in string.gmatch(claim == awaited and ids or '', '%S+') do
  if holds_lease(worker, id, claim) then hand_back(id) end
end
redis.call('ZREM', WORKERS, worker)
redis.call('DEL', CLAIM .. worker, WORKER .. worker, WORKER .. worker .. ':adapters')
redis.call('PUBLISH', WAKE, worker)
