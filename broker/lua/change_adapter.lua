-- Pins or unpins an adapter, or begins to unload it, which also calls off a fetch under its name.
--   ARGV: name, 'pin' | 'unpin' | 'drain' (unload once its waiting jobs are finished)
--         | 'force' (unload, and let its waiting jobs fail);
--         and perhaps how many adapters may be pinned at most
--   Returns the version of the desired state, or nil if the name is unknown, or the names of those
--   that are pinned if there may be no more: then nothing is changed.
-- Safe to repeat.
local CHANGES = {
  pin = { 'pinned', true }, unpin = { 'pinned', false },
  drain = { 'unloading', 'drain' }, force = { 'unloading', 'force' },
}
local name, change = ARGV[1], CHANGES[ARGV[2]]
if not change then return redis.error_reply('ERR no such change: ' .. ARGV[2]) end
local field, value = unpack(change)
local record, fetch = read_record(name), read_fetch(name)
local in_the_way = record and ARGV[2] == 'pin' and pins_in_the_way(name, ARGV[3])
if in_the_way then return in_the_way end
if field == 'unloading' then
  redis.call('HDEL', FETCHES, name)
elseif record and fetch and not is_over(fetch) then
  fetch.pinned = value -- It would pin the adapter when it is over, or take the pin away.
  write_fetch(name, fetch)
end
if not record then
  -- Unloaded while it was fetched, or after that had failed: there is nothing else to take away.
  local is_withdrawn = field == 'unloading' and fetch and type(fetch.version) ~= 'number'
  return is_withdrawn and desired_state_changed()
end
if record[field] == value then return tonumber(redis.call('GET', ADAPTERS_VERSION)) end
record[field] = value
write_record(name, record)
return desired_state_changed()
