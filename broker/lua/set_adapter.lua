-- Loads an adapter: every worker is to read it from the source, also if one is known by that name.
--   ARGV: name, source, '1' if it is pinned, else '0'
--   Returns the version of the desired state.
-- Repeated, it makes the workers read the source once more.
local name, source, pinned = unpack(ARGV)
local version = desired_state_changed()
write_record(name, {
  source = source, revision = cjson.null, pinned = pinned == '1', unloading = cjson.null,
  version = version,
})
return version
