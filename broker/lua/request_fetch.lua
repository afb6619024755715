-- Asks for an adapter to be fetched from the hub and then loaded. A fetch of something else under
-- that name is called off, but for its pin.
--   ARGV: name, an id that no rq job has, source (hf:owner/name[@revision]), '1' to pin it, '0' to
--         leave it pinned or unpinned as it is, and perhaps how many adapters may be pinned at most
--   Returns the id of the request: that of one for the same source that is not over yet, else the one
--   given. Or the names of those that are pinned if there may be no more: then nothing is changed.
-- Safe to repeat. The fetch begins once an rq job of that id is on the rq queue; fetchers see to that
-- within seconds if nobody else does.
local name, id, source, pinned, limit = unpack(ARGV)
if #id > 128 or not string.match(id, '^[%w_-]+$') then
  return redis.error_reply('ERR an id is up to 128 letters, digits, - and _')
end
local in_the_way = pinned == '1' and pins_in_the_way(name, limit)
if in_the_way then return in_the_way end
local fetch, wants_pin = read_fetch(name), pinned == '1' or is_pinned(name)
if not fetch or is_over(fetch) or fetch.source ~= source then
  fetch = { id = id, source = source, error = cjson.null, version = cjson.null }
end
fetch.pinned = wants_pin
write_fetch(name, fetch)
return fetch.id
