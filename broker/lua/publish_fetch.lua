-- Loads an adapter that was fetched, unless its request was called off.
--   ARGV: name, id of the request, source (hf:owner/name@commit), the revision that was read
--   Returns the version of the desired state, or nil if the request was called off or had failed.
-- Safe to repeat.
local name, id, source, revision = unpack(ARGV)
local fetch = read_fetch(name, id)
if not fetch or type(fetch.error) == 'string' then return false end
if is_over(fetch) then return fetch.version end
-- Pinned if the request says so.
fetch.version = load_adapter(name, source, revision, false)
write_fetch(name, fetch)
return fetch.version
