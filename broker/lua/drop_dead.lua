-- Takes jobs off the dead letters; they stay dead, with their reason and history.
--   ARGV: ids
--   Returns how many were taken off.
-- Safe to repeat.
local num_dropped = 0
for _, id in ipairs(ARGV) do
  local dead = call_if_sound('HGET', JOB .. id, 'dead')
  if dead then
    num_dropped = num_dropped + redis.call('XDEL', DEAD, dead)
    redis.call('HDEL', JOB .. id, 'dead', 'told')
  end
end
return num_dropped
