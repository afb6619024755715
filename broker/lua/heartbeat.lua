-- Writes a worker's observed state.
--   ARGV: worker, ms after which it counts as gone, state as JSON, then its adapters
local worker, alive_ms = ARGV[1], ARGV[2]
local key, adapters = WORKER .. worker, WORKER .. worker .. ':adapters'

-- Their names are written when they change only: of 10,000 that takes 20 ms.
local function note_adapters()
  local names = {}
  for i = 4, #ARGV do names[i - 3] = ARGV[i] end
  local digest = redis.sha1hex(table.concat(names, ' '))
  local is_noted = call_if_sound('HGET', key, 'adapters') == digest
  if is_noted and call_if_sound('SCARD', adapters) == #names then return end
  redis.call('DEL', adapters)
  in_pieces(names, function(...) redis.call('SADD', adapters, ...) end)
  redis.call('HSET', key, 'adapters', digest)
end

redis.call('ZADD', WORKERS, text(now_ms()), worker)
note_adapters()
redis.call('HSET', key, 'state', ARGV[3])
redis.call('PEXPIRE', key, alive_ms)
redis.call('PEXPIRE', adapters, alive_ms)
return redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', text(now_ms() - alive_ms))
