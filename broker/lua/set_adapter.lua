-- Loads an adapter: every worker is to read it from the source, also if one is known by that name.
-- What was read last under the name stays on record until a worker has read the new source. A fetch
-- under that name is called off.
--   ARGV: name, source, '1' to pin it, '0' to leave it pinned or unpinned as it is
--   Returns the version of the desired state.
-- Repeated, it makes the workers read the source once more.
local name, source, pinned = unpack(ARGV)
local version = load_adapter(name, source, cjson.null, pinned == '1')
redis.call('HDEL', FETCHES, name)
return version
