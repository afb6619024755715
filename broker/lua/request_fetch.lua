-- Asks for an adapter to be fetched from the hub and then loaded. A fetch of something else under
-- that name is called off.
--   ARGV: name, an id that no rq job has, source (hf:owner/name[@revision]), '1' if it shall be
--         pinned, else '0'
--   Returns the id of the request: that of an equal one that is not over yet, else the one given.
-- Safe to repeat. The fetch begins once an rq job of that id is on the rq queue; fetchers see to that
-- within seconds if nobody else does.
local name, id, source, pinned = unpack(ARGV)
if #id > 128 or not string.match(id, '^[%w_-]+$') then
  return redis.error_reply('ERR an id is up to 128 letters, digits, - and _')
end
local fetch = read_fetch(name)
if fetch and not is_over(fetch) and fetch.source == source and fetch.pinned == (pinned == '1') then
  return fetch.id
end
write_fetch(name, {
  id = id, source = source, pinned = pinned == '1', error = cjson.null, version = cjson.null,
})
return id
