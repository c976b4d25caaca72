// Sends the chosen images as base64 in the request itself: the server writes no files and opens no paths.
const input = element.querySelector('input');
const drop = element.querySelector('.vz-drop');
const error = element.querySelector('.vz-error');

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const data = reader.result;
      resolve({ name: file.name, data: data.slice(0, 5) === 'data:' && data.includes(',') ? data : 'data:;base64,' });
    };
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function send(files) {
  error.hidden = true;
  try {
    const large = files.find((file) => file.size > props.limit);
    if (large) {
      throw new Error(`${large.name} has ${(large.size / 2 ** 20).toFixed(1)} MB, more than ${props.limit / 2 ** 20}: scale it down`);
    }
    const uploads = await Promise.all(files.map(read));
    if (uploads.length) {
      props.value = JSON.stringify(uploads);
      trigger('upload');
    }
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
  }
  input.value = ''; // so that the same file can be chosen again
}

input.addEventListener('change', () => send([...input.files]));
drop.addEventListener('dragover', (event) => { event.preventDefault(); drop.classList.add('over'); });
drop.addEventListener('dragleave', () => drop.classList.remove('over'));
drop.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  send([...event.dataTransfer.files]);
});
document.addEventListener('paste', (event) => {
  const kind = props.kind === 'images' ? 'image/' : 'video/';
  const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith(kind));
  if (files.length && element.isConnected) { send(files); }
});
input.disabled = false; // now that its files are listened to
