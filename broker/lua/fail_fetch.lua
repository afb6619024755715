-- Gives a fetch up.
--   ARGV: name, id of the request, why
--   Returns 1, or 0 if the request was called off or is over.
-- Safe to repeat.
local name, id, reason = unpack(ARGV)
local fetch = read_fetch(name, id)
if not fetch or is_over(fetch) then return 0 end
fetch.error = reason
write_fetch(name, fetch)
return 1
