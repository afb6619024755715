-- Pauses the queue or an adapter: nothing new is claimed of it. Its lanes stay, but it is not ready.
--   ARGV: adapter, or '*' for the queue
--   Returns 1, or 0 if that was paused already.
-- Safe to repeat.
local name = ARGV[1]
for _, priority in ipairs(PRIORITIES) do redis.call('ZREM', READY .. priority, name) end
return redis.call('HSETNX', PAUSED, name, text(now_ms()))
