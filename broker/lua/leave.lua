-- Takes a worker that ends off the list of living ones, and hands back what its last claim brought
-- without its knowing: the reply was lost, and the worker ended before it could ask again.
--   ARGV: worker
-- Safe to repeat.
local worker = ARGV[1]
local claim, ids = string.match(redis.call('GET', CLAIM .. worker) or '', '^(%d+)(.*)$')
for id in string.gmatch(ids or '', '%S+') do
  if holds_lease(worker, id, claim) then hand_back(id) end
end
redis.call('ZREM', WORKERS, worker)
redis.call('DEL', CLAIM .. worker, WORKER .. worker, WORKER .. worker .. ':adapters')
redis.call('PUBLISH', WAKE, worker)
