-- Loads an adapter: every worker is to read it from the source, also if one is known by that name.
-- What was read last under the name stays on record until a worker has read the new source.
--   ARGV: name, source, '1' if it is pinned, else '0'
--   Returns the version of the desired state.
-- Repeated, it makes the workers read the source once more.
local name, source, pinned = unpack(ARGV)
local replaced = read_record(name)
local previous = replaced and replaced.previous
if replaced and type(replaced.revision) == 'string' then
  previous = { source = replaced.source, revision = replaced.revision }
end
local version = desired_state_changed()
write_record(name, {
  source = source, revision = cjson.null, pinned = pinned == '1', unloading = cjson.null,
  version = version, previous = previous or cjson.null,
})
return version
