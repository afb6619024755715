-- Settles which revision a loaded adapter has: the first worker that has read it says so. From then
-- on nobody serves what it replaces; who could not read it has to be told.
--   ARGV: name, version of the record that was acted on, the revision that was read
--   Returns the revision on record, or nil if the name is gone or was loaded again.
-- Safe to repeat.
local name, version, revision = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local record = read_record(name)
if not record or record.version ~= version then return false end
if type(record.revision) ~= 'string' then
  local replaces = type(record.previous) == 'table'
  record.revision, record.previous = revision, cjson.null
  write_record(name, record)
  if replaces then desired_state_changed() end
end
return record.revision
