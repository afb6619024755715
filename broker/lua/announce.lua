-- Adds the adapters that a worker was started with to the desired state, as far as that does not
-- say otherwise: a record of another source wins, and so does one that a command has just written
-- and nobody has read yet; it replaces what is announced, which is served if nobody can read it.
-- Other weights under the same source are a replacement.
--   ARGV: (name, record) an adapter
--   Returns the version of the desired state; it is raised if anything changed, or if it is the
--   first.
-- Safe to repeat.
local new_records = {}
for i = 1, #ARGV, 2 do
  local name, announced = ARGV[i], cjson.decode(ARGV[i + 1])
  local record = read_record(name)
  if not record then
    new_records[name] = announced
  elseif record.source == announced.source and record.revision ~= announced.revision
    and type(record.revision) == 'string' then
    record.revision = announced.revision
    new_records[name] = record
  elseif record.source ~= announced.source and type(record.revision) ~= 'string'
    and type(record.previous) ~= 'table' then
    record.previous = { source = announced.source, revision = announced.revision }
    new_records[name] = record
  end
end
if not next(new_records) and redis.call('EXISTS', ADAPTERS_VERSION) == 1 then
  return tonumber(redis.call('GET', ADAPTERS_VERSION))
end
local version = desired_state_changed()
for name, record in pairs(new_records) do
  record.version = version
  write_record(name, record)
end
return version
