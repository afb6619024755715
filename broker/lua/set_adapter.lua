-- Loads an adapter: every worker is to read it from the source, also if one is known by that name.
-- What was read last under the name stays on record until a worker has read the new source. A fetch
-- under that name is called off.
--   ARGV: name, source, '1' to pin it, '0' to leave it pinned or unpinned as it is, and perhaps how
--         many adapters may be pinned at most
--   Returns the version of the desired state, or the names of those that are pinned if there may be
--   no more: then nothing is changed.
-- Repeated, it makes the workers read the source once more.
local name, source, pinned, limit = unpack(ARGV)
local in_the_way = pinned == '1' and pins_in_the_way(name, limit)
if in_the_way then return in_the_way end
local version = load_adapter(name, source, cjson.null, pinned == '1')
redis.call('HDEL', FETCHES, name)
return version
