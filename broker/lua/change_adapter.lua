-- Pins or unpins an adapter, or begins to unload it.
--   ARGV: name, 'pin' | 'unpin' | 'drain' (unload once its waiting jobs are finished)
--         | 'force' (unload, and let its waiting jobs fail)
--   Returns the version of the desired state, or nil if the name is unknown.
-- Safe to repeat.
local CHANGES = {
  pin = { 'pinned', true }, unpin = { 'pinned', false },
  drain = { 'unloading', 'drain' }, force = { 'unloading', 'force' },
}
local name, change = ARGV[1], CHANGES[ARGV[2]]
if not change then return redis.error_reply('ERR no such change: ' .. ARGV[2]) end
local record = read_record(name)
if not record then return false end
local field, value = unpack(change)
if record[field] == value then return tonumber(redis.call('GET', ADAPTERS_VERSION)) end
record[field] = value
write_record(name, record)
return desired_state_changed()
