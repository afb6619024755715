-- Records the one result of each job whose lease the worker still holds.
--   ARGV: worker, then (id, claim, state, result) a job
--   Returns for each job 1 if the result is on record, 0 if the lease was lost.
-- Safe to repeat: a result that is on record already counts as recorded.
local worker = ARGV[1]
local replies, recorded = {}, {}
-- What becomes of lanes, adapters and submissions, by lane and submission: written once for all jobs.
local lanes, moves = {}, {}

local function note_end(id, to, entry, lane, submissions)
  if not lanes[lane.stream] then
    lane.entries = {}
    lanes[lane.stream] = lane
  end
  table.insert(lanes[lane.stream].entries, entry)
  for submission in string.gmatch(submissions, '%S+') do
    tell_finished(submission, id, to)
    moves[submission] = moves[submission] or {}
    moves[submission][to] = (moves[submission][to] or 0) + 1
  end
end

-- Whether the result is on record then. A record that was damaged meanwhile counts as lost, so that
-- it keeps no other from being recorded.
local function record(id, claim, to, result)
  local found = job_fields(id, 'state', 'worker', 'claim', 'entry', 'adapter', 'priority',
    'submissions')
  if not found then return false end
  local state, holder, current, entry, adapter, priority, submissions = unpack(found)
  if not (state == 'running' and holder == worker and current == claim) then
    return redis.call('HGET', JOB .. id, 'result') == result
  end
  if not (entry and adapter and submissions) then return false end
  redis.call('HSET', JOB .. id, 'state', to, 'result', result)
  redis.call('HDEL', JOB .. id, 'entry', 'claim', 'alone')
  local first = string.match(submissions, '%S+')
  note_end(id, to, entry, lane_in(adapter, priority or DEFAULT_PRIORITY, first), submissions)
  table.insert(recorded, id)
  return true
end

for i = 2, #ARGV, 4 do
  table.insert(replies, record(unpack(ARGV, i, i + 3)) and 1 or 0)
end
in_pieces(recorded, function(...) redis.call('ZREM', LEASES, ...) end)
for submission, numbers in pairs(moves) do
  for to, number in pairs(numbers) do count_moved(submission, 'running', to, number) end
end
for _, lane in pairs(lanes) do
  count('running', lane.adapter, -#lane.entries)
  drop_entries(lane, lane.entries)
end
return replies
