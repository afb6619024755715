-- Writes a worker's observed state.
--   ARGV: worker, ms after which it counts as gone, state as JSON, then its adapters
local worker, alive_ms = ARGV[1], ARGV[2]
local adapters = WORKER .. worker .. ':adapters'
redis.call('ZADD', WORKERS, text(now_ms()), worker)
redis.call('HSET', WORKER .. worker, 'state', ARGV[3])
redis.call('PEXPIRE', WORKER .. worker, alive_ms)
redis.call('DEL', adapters)
for i = 4, #ARGV do redis.call('SADD', adapters, ARGV[i]) end
redis.call('PEXPIRE', adapters, alive_ms)
return redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', text(now_ms() - alive_ms))
