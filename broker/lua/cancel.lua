-- Ends jobs as cancelled, waiting ones and running ones. A worker that runs one has lost its lease by
-- that, so what it may still answer is not recorded; it is told, so that it stops.
--   ARGV: ids of jobs
--   Returns {how many waited, how many ran, how many had ended already}; an id that names no job does
--   not count.
-- Safe to repeat: a job that is cancelled has ended.
local num_waiting, running, num_ended = 0, {}, 0
for _, id in ipairs(ARGV) do
  local state, version = state_and_version(id)
  if state and not reads_version(version) then
    -- Of a version that is not read here, or damaged: left alone.
  elseif state == 'running' then
    local worker = redis.call('HGET', JOB .. id, 'worker') or 'a worker unknown'
    end_job(id, 'cancelled', 'cancelled', 'cancelled while it ran on ' .. worker)
    table.insert(running, id)
  elseif TERMINAL[state] then
    num_ended = num_ended + 1
  elseif state then
    end_job(id, 'cancelled', 'cancelled', 'cancelled while it waited')
    num_waiting = num_waiting + 1
  end
end
if #running > 0 then redis.call('PUBLISH', CANCELLED, table.concat(running, ' ')) end
return { num_waiting, #running, num_ended }
